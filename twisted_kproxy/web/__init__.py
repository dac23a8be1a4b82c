"""What operators and load balancers can ask over HTTP."""
