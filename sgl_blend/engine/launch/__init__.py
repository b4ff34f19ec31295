"""What happens in the launching process: flags, checks, the server's own store, HTTP routes."""
