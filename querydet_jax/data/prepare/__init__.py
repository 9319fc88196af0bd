"""Write a data set once in the form that training reads fastest."""
