"""How the local launcher tells its ranks where they find each other."""

# The environment variable with the file descriptor of the socket on which rank 0 waits for the others. The launcher has
# bound it: until rank 0 has imported what it needs, another program could otherwise have taken the port.
STORE_DESCRIPTOR = "CROSSGUARD_STORE_FD"
