"""What the tests share: real servers, real processes, and fakes for what has to fail."""
