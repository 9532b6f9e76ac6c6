"""Compare tunefleet with the obvious ways: whole studies, epochs, schedulers, long studies, a GPU."""
