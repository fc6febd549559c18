"""What ships: the exported folder, device bundles, Triton repositories; inspect and doctor."""
