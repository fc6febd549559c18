"""The exported graph: tracing, the operator's function, forms, precision, metadata."""
