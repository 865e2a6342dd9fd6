def load_adapter(*a, **k): pass
