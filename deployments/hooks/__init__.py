"""For programs that call models: they say which task a call belongs to. Light: no Ray, no vLLM; tests run each."""
