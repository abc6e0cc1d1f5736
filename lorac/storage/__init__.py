"""What lies on disk: plans and programs as JSON, tensors in files, folders that change in one step."""
