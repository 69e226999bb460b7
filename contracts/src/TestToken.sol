// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";
import {ERC3009} from "@openzeppelin/contracts/token/ERC20/extensions/draft-ERC3009.sol";

/// @title Play money for devnets and tests, with the two signed ways in that real dollars have: EIP-2612 and EIP-3009
/// Warning: anyone can mint. Never deploy it where coins have value.
contract TestToken is ERC20Permit, ERC3009 {
    constructor() ERC20("Gristmill Test Dollar", "tUSD") ERC20Permit("Gristmill Test Dollar") {}

    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    function decimals() public pure override returns (uint8) {
        return 6;
    }
}
