"""What a service may do on its machine: account, view of the files, environment, system calls."""
