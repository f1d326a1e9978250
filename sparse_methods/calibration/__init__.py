"""From trial thresholds to the threshold that a target sparsity needs: observe, fit, keep."""
