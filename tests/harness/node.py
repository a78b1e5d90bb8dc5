"""node-vault, over `tests/node/vault.js`."""
