"""What a person sees: tables, HTML pages and pictures of what attends to what."""
