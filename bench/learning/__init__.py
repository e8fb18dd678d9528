"""What is learnt from where: commands that train models and print their AP."""
