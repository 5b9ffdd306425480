"""The specification of each op in plain torch: slow and obvious on purpose. Imports torch alone."""
