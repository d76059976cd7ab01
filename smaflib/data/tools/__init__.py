"""What is done with data sets before a run: check, fetch, convert labels."""
