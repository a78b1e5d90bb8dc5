"""What the product is, without any input or output: no clock, no files, no network."""
