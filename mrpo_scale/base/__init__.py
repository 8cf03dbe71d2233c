"""What every room uses and that knows nothing of the product: errors, ranks, files, devices."""
