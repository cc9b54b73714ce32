"""`python -m fastddim.bench`: verify each candidate against the float64 textbook, then time all of them in one run."""
