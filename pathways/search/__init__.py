"""Finding the pathway of a new task: what the model knows already, tried cheaply before anything is trained."""
