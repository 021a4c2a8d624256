"""What the user types: one file a verb. ``cli.py`` registers them."""
