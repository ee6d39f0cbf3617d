"""What people see of a run: status, console, TensorBoard."""
