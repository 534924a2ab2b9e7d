"""The binding to /dev/kvm: numbers and structures, one handle per fd, typed exits."""
