// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @title Play money for devnets and tests
/// Warning: anyone can mint. Never deploy it where coins have value.
contract TestToken is ERC20 {
    constructor() ERC20("Gristmill Test Dollar", "tUSD") {}

    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    function decimals() public pure override returns (uint8) {
        return 6;
    }
}
