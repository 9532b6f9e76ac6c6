"""Is it faster than the obvious way? Each benchmark times both arms, turn by turn, in one run."""
