// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {IVault} from "../../src/interfaces/IVault.sol";

/// @dev Strange tokens and wallets, for tests only. Compiled by build.mjs into tests/contracts/zoo.
contract FeeToken is ERC20("Fee", "FEE") {
    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    /// @dev One tenth of every transfer is burnt.
    function _update(address from, address to, uint256 amount) internal override {
        uint256 fee = from == address(0) ? 0 : amount / 10;
        if (fee > 0) super._update(from, address(0), fee);
        super._update(from, to, amount - fee);
    }
}

/// @dev As the early USDT: transfers return nothing.
contract NoReturnToken {
    mapping(address => uint256) public balanceOf;

    function mint(address to, uint256 amount) external {
        balanceOf[to] += amount;
    }

    function transfer(address to, uint256 amount) external {
        balanceOf[msg.sender] -= amount;
        balanceOf[to] += amount;
    }

    function transferFrom(address from, address to, uint256 amount) external {
        balanceOf[from] -= amount;
        balanceOf[to] += amount;
    }
}

/// @dev Says no by a return value and moves nothing.
contract FalseToken {
    mapping(address => uint256) public balanceOf;

    function transfer(address, uint256) external pure returns (bool) {
        return false;
    }

    function transferFrom(address, address, uint256) external pure returns (bool) {
        return false;
    }
}

/// @dev Calls back into the vault from the middle of a transfer.
contract ReentrantToken is ERC20("Reentrant", "RE") {
    IVault public vault;
    bytes public attack;

    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    function arm(IVault vault_, bytes calldata attack_) external {
        vault = vault_;
        attack = attack_;
    }

    function _update(address from, address to, uint256 amount) internal override {
        super._update(from, to, amount);
        if (attack.length > 0 && from != address(0)) {
            (bool ok, bytes memory why) = address(vault).call(attack);
            if (!ok) {
                assembly {
                    revert(add(why, 0x20), mload(why))
                }
            }
        }
    }
}

/// @dev ERC-1271 wallet of one key, which can also misbehave.
contract Wallet {
    enum Mood {
        Honest,
        Reverting,
        GasBurner,
        ReturnBomb,
        ShortReturn,
        YesToAll
    }

    address public immutable owner;
    Mood public mood;

    constructor(address owner_) {
        owner = owner_;
    }

    function setMood(Mood mood_) external {
        mood = mood_;
    }

    function isValidSignature(bytes32 digest, bytes calldata signature) external view returns (bytes4) {
        if (mood == Mood.Reverting) revert("no");
        if (mood == Mood.GasBurner) while (true) {}
        if (mood == Mood.ReturnBomb) {
            assembly {
                return(0, 1000000)
            }
        }
        if (mood == Mood.ShortReturn) {
            assembly {
                mstore(0, shl(224, 0x1626ba7e))
                return(0, 4)
            }
        }
        if (mood == Mood.YesToAll) return 0x1626ba7e;
        (address who, ECDSA.RecoverError error_,) = ECDSA.tryRecoverCalldata(digest, signature);
        return error_ == ECDSA.RecoverError.NoError && who == owner ? bytes4(0x1626ba7e) : bytes4(0xffffffff);
    }
}

/// @dev Takes coins by calling back first.
contract Greedy {
    IVault public immutable vault;
    uint256 public rounds;

    constructor(IVault vault_) {
        vault = vault_;
    }

    function deposit() external payable {
        vault.deposit{value: msg.value}(address(0), msg.value, address(this));
    }

    function take(uint256 amount) external {
        vault.withdraw(address(0), amount, address(this));
    }

    receive() external payable {
        if (rounds++ == 0) vault.withdraw(address(0), msg.value, address(this));
    }
}
