"""The queue on a cluster: NATS JetStream."""
