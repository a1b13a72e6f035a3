"""What the gateway is made of: each route's module, who is let in, and how it starts."""
