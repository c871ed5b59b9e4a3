"""What a quantised model lost: `verify MODEL --against ORIGINAL`."""
