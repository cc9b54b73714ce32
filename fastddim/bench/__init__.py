"""`fastddim bench`: verify each candidate against a float64 computation, then time all of them in one run."""
