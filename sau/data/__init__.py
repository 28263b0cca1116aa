SIDE = 1024  # pixels of the largest picture
