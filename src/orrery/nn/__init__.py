"""Networks: tensors in, tensors out; no files, no prompts."""
