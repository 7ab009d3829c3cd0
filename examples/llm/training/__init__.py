"""What is trained, by what, on what, and how well it does."""
