"""The scheduling core: events in, actions out. No Ray, no vLLM, no Redis, no clock."""
