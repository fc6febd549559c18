"""The method in PyTorch: operator, pruned model, families, costs."""
