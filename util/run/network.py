"""The network interface by which processes of several machines reach one another."""

import os
import socket
import struct

SIOCGIFADDR = 0x8915  # of Linux: the address of an interface
NOWHERE = "192.0.2.1"  # reserved for documents; nothing is sent there


def choose_interface(address):
    """Name an interface to gloo where it would take the loopback.

    gloo uses the address of this machine's own name, which /etc/hosts often says is 127.0.1.1.
    address: of process 0; None if unknown. Does nothing if GLOO_SOCKET_IFNAME is set, if the name
    has a real address, or if no interface is found.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") or not _is_loopback(_address_of(socket.gethostname())):
        return
    towards = (own_address(host) for host in (address, NOWHERE) if host)
    own = next((found for found in towards if not _is_loopback(found)), None)
    if own and (name := interface_of(own)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def own_address(host):
    """The address, as text, that packets of this machine to a host come from; None if unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect((host, 9))  # any port: nothing is sent
            return one.getsockname()[0]
        except OSError:
            return None


def interface_of(address):
    """The name of the interface that has an address; None if unknown."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(one, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # has none
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def _address_of(name):
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _is_loopback(address):
    return address is None or address.startswith("127.")
