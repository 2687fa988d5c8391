"""Reports for people: tables, HTML pages and pictures of what attends to what."""
