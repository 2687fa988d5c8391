"""A page on this machine to look at one image: what a model attends to, dense and sparse, and what each costs."""
