"""The private CA of a HelixFlow installation: certificates, keys and revocation of its services.

`layout` names the files, `issue` and `rotate` write them, `verify` and `show` read them, `cli` is `helixflow pki`.
"""
