"""Language models: the protocol, the networks, and the folders they come from."""
