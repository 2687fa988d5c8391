"""Small helpers without a place of their own: files, messages, checks of settings, photographs."""
