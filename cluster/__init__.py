"""What crosses processes and what outlives them: messages, gRPC streams, Redis."""
