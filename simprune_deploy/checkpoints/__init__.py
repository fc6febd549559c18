"""model.pt in its many shapes, read into a timm model."""
