"""The agent: secrets for the processes of this machine, over a unix socket."""
