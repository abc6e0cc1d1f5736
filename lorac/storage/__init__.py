"""Files and folders: plans and programs as JSON, tensors, and changes of a folder in one step."""
