"""Where robustscale meets Ray Train and Accelerate. Runs from the checkout; not part of the wheel."""
