"""Where images to be scored come from."""
