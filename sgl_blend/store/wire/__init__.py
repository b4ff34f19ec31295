"""Between a client and the store: messages, sockets, keys, shared memory."""
