"""What people see: progress, tables, pictures and the model card."""
