"""Sampling methods: a file each, with one function that reads like its paper and returns a `StepTable`."""
