"""Contract tests of methods and families, for anybody's CI."""

from phigrow.testing.family_contract import check_family
from phigrow.testing.method_contract import ContractError, check_method

__all__ = ["ContractError", "check_family", "check_method"]
