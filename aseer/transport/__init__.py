"""Messages between the controller and the instances: sockets and their wire format."""
