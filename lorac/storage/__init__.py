"""Files and folders: plans and programs as JSON, tensors, and atomic changes of folders."""
